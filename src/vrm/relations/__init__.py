"""The mathematics of VRM: difference relations between predictions, their matching, and the pruning of edges.

A *relation* of two vertices is the unit difference vector between them. A graph of relations joins every vertex of the
real view to every vertex of the virtual view. VRM (Zhang, Xie, Cai, Ma, "VRM: Knowledge Distillation via Virtual
Relation Matching", ICCV 2025) trains the student's graph to equal the teacher's. Vertices are the rows of a matrix:
the predictions of samples, (B, C), for *inter-sample* relations; the columns of the same matrix, (C, B), for
*inter-class* relations; or pooled features.

Algorithm 1 of the paper stores every difference vector; here none is stored. With the teacher's vertices a (real) and b
(virtual) and the student's c (real) and d (virtual),

    (a_n - b_m) . (c_n - d_m) = a_n . c_n - a_n . d_m - b_m . c_n + b_m . d_m

and likewise for the squared lengths. Matrix products therefore give all that the loss and its gradient need, for some
rows of the graph (a *tile*) at a time.

Where an edge is short, as between two views of one image, these sums cancel. Float64 products are accurate enough for
float32 results down to edges of 2^-10 of the length of their vertices. A tile with shorter edges is computed from two
products instead, an exact one of the leading bits and one of the remainder (:mod:`vrm.relations.products`), which
together carry about 76 bits. Vertices given in float64 leave no such margin: for them, and in small graphs, every edge
is computed from its difference.

The gradient is computed together with the value, tile by tile. The backward pass recomputes nothing, and no matrix of
the size of the graph outlives its tile. Only first derivatives exist; differentiating a gradient raises an error.

Shapes in this package: N real vertices, M virtual vertices, D coordinates of a vertex, B samples, C classes, R rows
of a tile, K selected edges. Graphs are indexed [virtual, real]: (M, N).
"""

from vrm.relations.matching import Matching, check_matching, match_relations
from vrm.relations.pruning import (
    MAX_STORED_EDGES,
    EntropyThreshold,
    JointEntropy,
    check_pruning,
    joint_entropy,
    prune_edges,
)
from vrm.relations.vertices import class_distributions, gather_vertices, own_rows, predictions

__all__ = [
    "MAX_STORED_EDGES",
    "EntropyThreshold",
    "JointEntropy",
    "Matching",
    "check_matching",
    "check_pruning",
    "class_distributions",
    "gather_vertices",
    "joint_entropy",
    "match_relations",
    "own_rows",
    "predictions",
    "prune_edges",
]
