"""Layers as programs: what a layer computes, as a short list of steps over named values.

`program` has the text and its parts; `record` reads a program off a layer's own forward and judges it; `passes` fuse
steps; `reference` and `ops` run them.
"""
