"""A small generated cohort, and the tour that packs it, trains on it, stops, resumes and audits."""
