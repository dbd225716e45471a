"""Measurements. python -m benchmarks [--quick] [NAME ...]"""
