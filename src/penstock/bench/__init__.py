"""Measurements that own the numbers Penstock publishes."""
