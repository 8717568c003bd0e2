# SPDX-License-Identifier: Apache-2.0
"""From catalogues, histories and policies to layouts: NumPy and integers, no GPU."""
