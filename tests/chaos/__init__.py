"""The chaos run: real servers and processes, clients at a set rate, random faults from a seed, and a judge.

It uses the product's code to start the embedded servers, and otherwise observes the product from outside.
"""
