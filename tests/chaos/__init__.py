"""The chaos run: real servers and processes, clients at a set rate, faults at random from a seed, and a judge.

Only the starting of the embedded servers is the product's; everything else here looks at it from outside.
"""
