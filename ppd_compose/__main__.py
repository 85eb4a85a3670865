"""`python -m ppd_compose` is `ppd-compose`."""

from .cli import main

main()
