"""FastAPI with AsyncSession on PostgreSQL: orders whose customers are reminded to pay.

``DATABASE_URL=postgresql+asyncpg://... uvicorn --factory examples.fastapi_shop.app:create_app`` serves, and
``DATABASE_URL=... python -m examples.fastapi_shop.worker`` fires the timers, in as many processes as you like.
"""
