"""Comparisons of many methods on equal terms, each ending in a table and plots.

subjects: a model with one cache, as tasks see it; recall_task, dialogues: what is asked; kv_tasks: the three tasks of
the cache study; kv_methods: methods and the settings that meet a budget; kv_study: its cells, stored as they are
finished; kv_peers: other libraries as subjects; kv_resident: resident bytes in processes of their own; kv_report: table
and page. efficientllm: the efficiency study; efficiency_sizes: what it compares; efficiency_torch and _precision: its
jobs, run by efficiency_worker; efficiency_records, _rank and _report: what is made of them.
"""
