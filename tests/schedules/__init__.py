"""The schedule tester: the project's own statements against a real Postgres, step by step, in random order.

Several connections act as relays, workers, sweep, rescue, operators, retention and adders. Each actor is a thread that
runs the product's code and stops before every statement; a scheduler decides which of them goes on. A trigger records
each committed transition of a row, and a judge compares it with the table in the design.

Redis is modelled in memory here, as a bag that loses, repeats and shuffles jobs. All other tests use a real one: they
test what the product does with Redis. This one tests what the statements do to a row whatever Redis does, and needs a
Redis that can be made to do anything between two steps.
"""
