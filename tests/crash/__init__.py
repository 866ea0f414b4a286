"""Every crash point in the life of an operation, one after the other.

``faults.py``       the kinds of faults, and wrappers of store, producer and client that inject them
``shop.py``         the operations, and the ledger of the runs of their tasks and hooks
``process.py``      simulated processes that start, die, stall and wake up
``simulation.py``   one database and one broker, and the life of one operation under a plan of faults
``invariants.py``   the invariants that hold after every fault
``table.py``        the table of crash points for the documentation

No list of crash points is written by hand. A run without faults numbers every call to the database, to Kafka and to
user code; then there is one run for each number and each fault that is possible at this call.
"""
