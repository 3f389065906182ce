//! Matrix products (provisional; the numerical floor replaces this file).
