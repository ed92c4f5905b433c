"""What tests of agents use: Lumos's real server on an in-memory network, on a virtual clock. The server never loads it."""
