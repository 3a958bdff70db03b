"""How it is drawn: pure functions, data in, plotly `Figure` out. Imports plotly, which the library itself does not."""
