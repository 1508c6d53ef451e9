"""Promises of titans_train.data: order, packing, integrity and layouts, on real prepared folders."""
