"""Where it runs: command line, environment, local ranks. The only reader of os.environ."""
