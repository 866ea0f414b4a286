"""Every point at which a consumer can die in the life of an operation, one after the other.

``faults.py``             what may go wrong, and the parts of a process in which it does
``shop.py``               the operations, and the ledger of what ran
``process.py``            processes that come, die, sleep and wake
``world.py``              one database and one bus, and what becomes of an operation there
``invariants.py``         what must hold whatever happened
``table.py``              the table of points for the documentation

Points are not listed by hand: an undisturbed run numbers every call to the database, to Kafka and to the code of users;
then there is a run for each number and for each thing that may go wrong there.
"""
