"""The command line, as `python -m esd_lora`."""

from esd_lora.cli import main

main()
