//! End to end: a real child, captured.
