create unique index tag_cloud_label on reports.tag_cloud (label);
