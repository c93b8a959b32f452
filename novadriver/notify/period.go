package notify

import "time"

// Last returns the period that was completed most recently before now (nova.utils.last_completed_audit_period).
func (p Period) Last(now time.Time) (begin, end time.Time) {
	now = now.UTC()
	y, m, d := now.Date()
	var back func(time.Time) time.Time
	switch p.Unit {
	case "hour":
		end = time.Date(y, m, d, now.Hour(), p.Offset, 0, 0, time.UTC)
		back = func(t time.Time) time.Time { return t.Add(-time.Hour) }
	case "day":
		end = time.Date(y, m, d, p.Offset, 0, 0, 0, time.UTC)
		back = func(t time.Time) time.Time { return t.AddDate(0, 0, -1) }
	case "year":
		end = time.Date(y, time.Month(max(p.Offset, 1)), 1, 0, 0, 0, 0, time.UTC)
		back = func(t time.Time) time.Time { return t.AddDate(-1, 0, 0) }
	default:
		end = time.Date(y, m, max(p.Offset, 1), 0, 0, 0, 0, time.UTC)
		back = func(t time.Time) time.Time { return t.AddDate(0, -1, 0) }
	}
	if !end.Before(now) {
		end = back(end)
	}
	return back(end), end
}
