package registrytest

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// Fault breaks answers. What it does not say goes its ordinary way.
type Fault struct {
	Path   string // of the requests that it is for: they contain it
	Header string // and have this header, if it is not ""
	Skip   int    // this many of them are let through first
	Times  int    // then this many are broken; 0 is all

	Status  int               // answered instead
	With    map[string]string // headers of that answer
	Body    string            // and its body
	Delay   time.Duration     // before anything is answered
	Hang    bool              // nothing is answered until the client goes or the test ends
	Reset   bool              // the connection is cut before an answer
	Cut     int64             // the connection is cut after this many bytes of the body
	Stall   int64             // the body stops after this many bytes, until Release or the test's end
	Slow    time.Duration     // between two KiB of the body
	Corrupt bool              // a bit of the body's first byte is another
	NoRange bool              // Range is not understood: 200 and everything
	Replace map[string]string // headers of the ordinary answer that are replaced, or removed by ""
	Longer  int64             // this many bytes are added to the body, and to its Content-Length

	release chan struct{}
	once    sync.Once
}

// Add makes faults take part; the first that is for a request breaks it.
func (s *Server) Add(faults ...*Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range faults {
		f.release = make(chan struct{})
		if f.Times == 0 {
			f.Times = -1
		}
		s.faults = append(s.faults, f)
	}
}

// Clear takes all faults away and lets go what they hold.
func (s *Server) Clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.faults {
		f.Release()
	}
	s.faults = nil
}

// Release lets go what f holds (Hang, Stall) for good. It may be called again.
func (f *Fault) Release() { f.once.Do(func() { close(f.release) }) }

// fault finds the fault that breaks r, and counts it.
func (s *Server) fault(r *http.Request) *Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.faults, func(f *Fault) bool {
		return f.Times != 0 && strings.Contains(r.URL.Path, f.Path) && (f.Header == "" || r.Header.Get(f.Header) != "")
	})
	if i < 0 {
		return nil
	}
	f := s.faults[i]
	if f.Skip > 0 {
		f.Skip--
		return nil
	}
	if f.Times > 0 {
		f.Times--
	}
	return f
}

// apply does what f says before the answer, and tells w the rest. It reports
// whether the request has been answered.
func (f *Fault) apply(w *writer, r *http.Request) bool {
	if f.Delay > 0 {
		select {
		case <-time.After(f.Delay):
		case <-w.s.done:
		case <-r.Context().Done():
		}
	}
	if f.Hang {
		select {
		case <-f.release:
		case <-w.s.done:
		case <-r.Context().Done():
		}
	}
	if f.Reset {
		panic(http.ErrAbortHandler)
	}
	if f.Status != 0 {
		for k, v := range f.With {
			w.Header().Set(k, v)
		}
		w.WriteHeader(f.Status)
		w.Write([]byte(f.Body))
		return true
	}
	if f.NoRange {
		r.Header.Del("Range")
	}
	w.f = f
	return false
}

// writer counts what is answered, and breaks it.
type writer struct {
	http.ResponseWriter
	s     *Server
	f     *Fault // may be nil
	entry *Request
	began bool
	sent  int64 // of the body
}

// WriteHeader sends the headers as the fault wants them.
func (w *writer) WriteHeader(status int) {
	if w.began {
		return
	}
	w.began = true
	h := w.Header()
	if w.f != nil {
		for k, v := range w.f.Replace {
			h.Del(k)
			if v != "" {
				h.Set(k, v)
			}
		}
		var n int64
		if _, err := fmt.Sscan(h.Get("Content-Length"), &n); err == nil && w.f.Longer > 0 {
			h.Set("Content-Length", fmt.Sprint(n+w.f.Longer))
		}
	}
	w.s.mu.Lock()
	w.entry.Status = status
	w.s.mu.Unlock()
	w.ResponseWriter.WriteHeader(status)
}

// Write sends a part of the body.
func (w *writer) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	all := len(p)
	if w.f == nil {
		return w.send(p)
	}
	if w.f.Corrupt && w.sent == 0 && len(p) > 0 {
		p = slices.Clone(p)
		p[0] ^= 0x20
	}
	if w.f.Longer > 0 {
		p = append(slices.Clone(p), make([]byte, w.f.Longer)...)
	}
	for len(p) > 0 {
		n := int64(len(p))
		if w.f.Slow > 0 {
			n = min(n, 1024)
		}
		for _, at := range []int64{w.f.Cut, w.f.Stall} {
			if at > w.sent {
				n = min(n, at-w.sent)
			}
		}
		if _, err := w.send(p[:n]); err != nil {
			return 0, err
		}
		p = p[n:]
		w.pause()
	}
	return all, nil
}

// pause does what the fault wants between two parts of the body.
func (w *writer) pause() {
	if w.f.Slow > 0 {
		w.flush()
		time.Sleep(w.f.Slow)
	}
	if w.f.Cut > 0 && w.sent >= w.f.Cut {
		w.flush()
		panic(http.ErrAbortHandler)
	}
	if w.f.Stall > 0 && w.sent >= w.f.Stall {
		w.flush()
		select {
		case <-w.f.release:
		case <-w.s.done:
			panic(http.ErrAbortHandler)
		}
	}
}

func (w *writer) send(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.sent += int64(n)
	w.s.mu.Lock()
	w.entry.Bytes = w.sent
	w.s.mu.Unlock()
	return n, err
}

func (w *writer) flush() {
	if f, ok := w.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}
