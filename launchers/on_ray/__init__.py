"""Ray: started on one machine or joined on a cluster, and trainings on its workers."""
