"""Retrieval: which of many vectors are nearest to a query, held in few bytes.

`base` has the seam, an index that is searched. `embedding_storage` holds vectors in fewer dimensions and fewer bits
(`reducers`, `vector_codecs`), `vector_file` keeps them on disk, `ranking` measures what a form costs in quality.
`spann` reads lists of vectors from disk around heads in memory (`head_tree`, `closure`, `list_file`, `spann_file`,
`spann_shards`). `curator` is one index that tenants share (`cluster_tree`), `curator_file` keeps it on disk.
`bolt` is a map whose host does not learn which keys are used: `untrusted` is what that host holds, `oblivious_file`
keeps a map on disk, `oblivious_ring` serves clients, `oblivious_bounds` says how full it becomes, `path_oram`: rivals.
"""

from __future__ import annotations

from memwall.retrieve.base import Best, Hits, VectorIndex

__all__ = ["Best", "Hits", "VectorIndex"]
