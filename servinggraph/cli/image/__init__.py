"""Images of graphs: what belongs to a graph, the build context made of it, and the engine that builds it."""
