"""Several devices and processes: the mesh, shardings by parameter path, and who belongs to a job."""
