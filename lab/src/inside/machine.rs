//! A host that is a machine of its own.
