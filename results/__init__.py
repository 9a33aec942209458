"""What people read: the papers' reference cells, reproductions, tables, figures and reports."""
