"""An OpenAI-compatible server over the engine, which never crosses its budget.

settings: limits. fields, parse: bodies become checked requests. service: the bridge between sockets and the engine's
thread. choices: tokens become text, stop strings and log-probabilities. answers: OpenAI's forms. generate, control:
routes. guard: key, hosts, sizes and counts before anything else. metrics: Prometheus. memory_map and page.html: the
live page. app: all together, signals and a graceful end.
"""
