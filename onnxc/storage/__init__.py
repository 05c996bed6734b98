"""How values are stored in few bits: codes and tables in the graph, and packed files."""
