"""What a person types after `python -m launch`: a verb a file, each with HELP, arguments and run.

`arguments(parser)` says what the verb takes, `run(args)` does it and returns the exit status.
"""

VERBS = ("train", "doctor", "compare", "generate", "rollout", "report", "keys")
