"""`python -m authsvc`."""

from authsvc.cli import main

main()
