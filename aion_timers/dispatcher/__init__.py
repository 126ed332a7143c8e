"""The loops that fire timers: claim what is due, call a handler, settle.

`pacing` decides when and how much, `core` keeps the books of what is in flight, and `threads` and `tasks` wait, call
handlers and talk to the database.
"""

from aion_timers.dispatcher.pacing import Backoff
from aion_timers.dispatcher.tasks import AsyncDelivery, AsyncDispatcher
from aion_timers.dispatcher.threads import Delivery, Dispatcher

__all__ = ["AsyncDelivery", "AsyncDispatcher", "Backoff", "Delivery", "Dispatcher"]
