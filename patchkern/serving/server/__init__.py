# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server over `recommend`: one model, one thread that computes, requests batched as they come."""
