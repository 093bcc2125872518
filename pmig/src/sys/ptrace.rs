//! ptrace(2) requests, typed.
