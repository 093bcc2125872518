#!/usr/bin/python3
"""Computes through nested generators, half finished at every moment."""

import os
import sys
import time

# Made by whoever does not want to wait for the end.
hurry = f"/srv/work/hurry.{os.getpid()}"
lines, pace = int(sys.argv[1]), float(sys.argv[2])


def words(seed):
    while True:
        seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
        yield seed >> 33


def pairs(source):
    for first in source:
        yield first, next(source)


def sums(source, depth):
    if depth == 0:
        for a, b in source:
            yield a ^ b
        return
    held = None
    for value in sums(source, depth - 1):
        if held is not None:
            value = (value + held * depth) % 1000003
        held = yield value


def tree(depth, source):
    if depth == 0:
        yield next(source)
        return
    yield from tree(depth - 1, source)
    yield from tree(depth - 1, source)


chain = sums(pairs(words(1)), 40)
walk = iter(())
seen = {}
for number in range(lines):
    total = 0
    for _ in range(200):
        try:
            value = next(walk)
        except StopIteration:
            walk = tree(9, chain)
            value = next(walk)
        seen[value % 5003] = seen.get(value % 5003, 0) + 1
        total = (total * 31 + value) % 2**61
    print(number, total, len(seen), 2.0 ** 0.5 * total, flush=True)
    if pace and not os.path.exists(hurry):
        time.sleep(pace)
print("PASS checksum", sum(k * v for k, v in sorted(seen.items())))
