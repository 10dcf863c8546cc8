"""The page filter: CRIU's final dump passes over pages that the target already has (docs/adr/0012-page-filter.md)."""
