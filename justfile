_default:
    @just --list

# Two machines to try pmig on, a and b.
lab-up:
    cargo lab up

# End them.
lab-down:
    cargo lab down

# See a program move.
demo:
    cargo lab demo

# Everything that can be tested here.
test:
    cargo test

# Hostile files, other ones each minute, until one gets out of hand.
fuzz:
    while cargo test -p lab --test end_to_end -- netns::dumping::no_file; do :; done

# How long a program stands still, and how fast memory travels.
bench:
    cargo bench

# Everything that has to hold before a change goes in.
ci:
    .ci/run
