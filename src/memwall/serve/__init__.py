"""An OpenAI-compatible server over the engine, which never crosses its budget.

settings: limits. fields, parse: bodies become checked requests. service: the bridge between sockets and the engine's
thread. choices: tokens become text, stop strings and log-probabilities. answers: OpenAI's forms. generate, control:
routes. guard: key, hosts, sizes and counts before anything else. metrics: Prometheus. memory_map and page.html: the
live page. app: all together, signals and a graceful end.
Offline batches: batch_file reads requests and keeps answers, batch runs them. bench measures servers, watch
asks them meanwhile; traces and burstgpt are the load that is sent.
"""
