"""What is in a graph. Nothing here changes one."""
