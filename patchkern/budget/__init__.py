# SPDX-License-Identifier: Apache-2.0
"""What a run needs of a device's memory, predicted and counted."""
