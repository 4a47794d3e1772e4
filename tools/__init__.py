"""Pictures, exports, timings."""
