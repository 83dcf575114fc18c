"""The demo: its video world, its grammar of prompts and the automatic score."""
