"""Whole systems on a virtual clock: one seed makes clients, servers, vendors, faults."""
