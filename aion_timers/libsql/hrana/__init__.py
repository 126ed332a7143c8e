"""A libSQL server (sqld, Turso) over HTTP, by its public protocol Hrana; it needs httpx, and not the libSQL driver.

A transaction is one stream of the server's, which begins with the transaction's first statement and ends with it.
Between transactions nothing is open there, so a connection may stay idle for as long as it likes.
"""
