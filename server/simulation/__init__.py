"""Whole systems on a virtual clock: from one seed a world of clients, servers, vendors and faults, and what must hold."""
