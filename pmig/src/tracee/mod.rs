//! Hands inside another process.
