"""`python -m llmkern` is `llmkern`."""

from llmkern.cli import main

main()
