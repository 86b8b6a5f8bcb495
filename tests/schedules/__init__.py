"""The schedule tester: runs the product's statements on a real Postgres, one at a time, in random order.

Several connections act as relays, workers, sweep, rescue, operators, retention and adders. Each actor is a thread that
runs the product's code and stops before every statement; a scheduler decides which of them continues. A trigger records
each committed transition of a row, and a judge compares it with the table in the design.

Redis is modelled in memory, with jobs that may be lost, repeated and shuffled. All other tests use a real Redis: they
test what the product does with Redis. This one tests what the statements do to a row whatever Redis does, which needs a
Redis that can do anything between two steps.
"""
