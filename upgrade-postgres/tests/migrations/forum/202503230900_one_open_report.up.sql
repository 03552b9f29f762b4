create unique index one_open_report on forum.reports (post) where not closed;
