"""Threads and processes: the lock that finalisers cannot enter twice, and what a fork must forget."""
