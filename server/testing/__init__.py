"""What tests of agents use: Lumos's real server, in memory, on a virtual clock. The server itself never loads it."""
