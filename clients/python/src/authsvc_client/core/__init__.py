"""How a token is judged: pure, without I/O, the clock passed in. The server judges by this too."""
